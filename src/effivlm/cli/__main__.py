"""`python -m effivlm.cli` is `effivlm`."""

from effivlm.cli import app

if __name__ == "__main__":
    app()
