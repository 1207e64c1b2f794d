"""`python -m causalrope_sp`, the same as `causalrope-sp`; torchrun starts its ranks through it."""

from causalrope_sp.cli.main import main

if __name__ == "__main__":
    main()
