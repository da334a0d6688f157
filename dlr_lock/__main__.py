"""`python -m dlr_lock` is `dlr-lock`."""

from .cli import main

if __name__ == "__main__":
    main()
