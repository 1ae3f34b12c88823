"`python -m layerdiffusion` is the command `layerdiffusion`."

import sys

from layerdiffusion.interface.cli import main

if __name__ == "__main__":
    sys.exit(main())
