"""`python -m fastpref`, which is also what `torchrun -m` and `accelerate launch -m` start."""

from fastpref.commands.cli import app

if __name__ == "__main__":
    app(prog_name="fastpref")
