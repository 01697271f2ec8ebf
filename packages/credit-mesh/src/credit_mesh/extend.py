"""What packages that build on credit-mesh need of it beyond :mod:`credit_mesh`, and users do not.

These names keep their meaning within a minor version, as those of :mod:`credit_mesh` do. Importing this imports torch.
"""

from credit_mesh.manager import set_aside
from credit_mesh.mesh import logger, mesh_of

__all__ = ["logger", "mesh_of", "set_aside"]
