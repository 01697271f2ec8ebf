"""Programs written for ``credit.domain_parallel`` and ``credit.parallel`` run on these packages, unchanged.

:func:`install` makes the import paths of ``credit_parallel.dropin.names.MODULES`` resolve to our modules. For
programs that cannot be edited::

    python -m credit_parallel.dropin train.py --config config.yml
    torchrun --nproc-per-node 8 -m credit_parallel.dropin train.py --config config.yml
    torchrun --nproc-per-node 8 -m credit_parallel.dropin -m some.module --config config.yml

Where ``miles-credit`` is installed, the rest of ``credit`` stays as it is: all that changes is what this process finds
under those names. No file is written. See ``docs/dropin.md``.
"""

from credit_parallel.dropin.hook import install, uninstall

__all__ = ["install", "uninstall"]
