"""The laboratory: calibration, evaluation, the search for recipes, costs. It imports the core, never the reverse."""
