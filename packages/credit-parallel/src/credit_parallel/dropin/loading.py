"""``load_state_dict`` of plain models, for checkpoints that the reference wrote of a converted one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from credit_domain.extend import with_plain_names

_original: Callable[..., Any] = nn.Module.load_state_dict


@functools.wraps(_original)
def load_state_dict(self: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """``torch.nn.Module.load_state_dict``, with the names of the reference's converted models too."""
    # What is no mapping is torch's to refuse.
    named = with_plain_names(self, state_dict) if isinstance(state_dict, Mapping) else state_dict
    return _original(self, named, *args, **kwargs)
