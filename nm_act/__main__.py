"""``python -m nm_act`` is the command ``nm-act``."""

from .cli import main

if __name__ == "__main__":
    main()
