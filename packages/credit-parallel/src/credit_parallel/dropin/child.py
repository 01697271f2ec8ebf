"""The main module of a program, in a process that multiprocessing started anew; it imports this in its place."""

from credit_parallel.dropin.program import run_as_child

if __name__ == "__mp_main__":
    globals().update(run_as_child(__name__))
