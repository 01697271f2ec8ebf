"""The operations: what each is stands in one place, its record, function and layer.

``credit_domain.functional`` and ``credit_domain.layers`` are the faces of these modules.
"""
