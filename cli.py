"""`python cli.py …` in a checkout is the installed `camri-tune …`."""

from camri_tune.cli import main

if __name__ == "__main__":
    main()
