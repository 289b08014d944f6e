"""`python -m launch` is the command `tokenring`; under torchrun, mpirun or srun each process becomes one rank."""

import sys

from launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
