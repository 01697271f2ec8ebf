"""The halo exchange, from :mod:`credit_halo`, under the name that programs know it by."""

from credit_halo import HaloExchange
from credit_halo.extend import HaloExchangeFunction as _HaloExchangeFunction

__all__ = ["HaloExchange", "_HaloExchangeFunction"]
