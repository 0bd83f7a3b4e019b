"""Calibration: the data that mitigations need, from a few windows of text, decoder block by decoder block."""

from ...conversion.calibration import load_calibration, save_calibration
from .data import calibration_windows
from .run import CalibrationSettings, calibrate

__all__ = ["CalibrationSettings", "calibrate", "calibration_windows", "load_calibration", "save_calibration"]
