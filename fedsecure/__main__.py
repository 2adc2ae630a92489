"""``python -m fedsecure``."""

from fedsecure.cli.app import main

if __name__ == "__main__":
    main()
