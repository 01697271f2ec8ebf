"""The halo exchange, from :mod:`credit_halo`, under the name that programs know it by."""

from credit_halo.halo_exchange import HaloExchange, _HaloExchangeFunction

__all__ = ["HaloExchange", "_HaloExchangeFunction"]
