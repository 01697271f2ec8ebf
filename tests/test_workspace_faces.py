"""Upper packages import from the faces of lower ones alone, and the linter's tool refuses what does not."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("check_layers", ROOT / "tools" / "check_layers.py")
check_layers = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_layers)

LOWER = ["credit_mesh", "credit_halo"]

REFUSED = {
    "an underscore module": "from credit_halo._torch_private import group_by_name",
    "a deep module": "from credit_halo.agreement import agree",
    "a module below a face": "from credit_halo.testing._threads import run_threads",
    "a module through the package": "from credit_halo import agreement",
    "a module that a face offers, around it": "from credit_halo.ops import begin",
    "a name with an underscore": "from credit_halo.extend import _HaloExchangeFunction",
    "a name that no face lists": "from credit_halo.extend import broken",
    "everything": "from credit_halo import *",
    "a lazy import": "def f():\n    from credit_halo.agreement import agree\n    return agree",
    "for types only": "if TYPE_CHECKING:\n    from credit_mesh.manager import DomainParallelManager",
    "a module by another name": "import credit_halo.agreement as a",
    "a module by its name": "import credit_halo.agreement",
    "by text": 'import importlib\nimportlib.import_module("credit_halo.agreement")',
    "an attribute of a package": "import credit_halo\ncredit_halo.agreement.agree()",
    "an attribute of a face": "import credit_halo.extend as below\nbelow.learning",
    "an attribute of a module that a face offers": "from credit_halo.extend import ops\nops._in_flight.clear()",
}

ALLOWED = {
    "names of a face": "from credit_halo import HaloExchange, plan_rows",
    "names of the face for upper packages": "from credit_halo.extend import agree as agreed, learner",
    "a face through its package": "from credit_halo import extend\nextend.agree()",
    "a face by another name": "import credit_mesh.extend as mesh\nmesh.set_aside()",
    "a module that a face offers": "from credit_halo.extend import ops\nops.begin()",
    "help for tests": "from credit_halo.testing import run_threads",
    "version": "import credit_halo\ncredit_halo.__version__",
    "of the same package": "from credit_domain._torch_private import share\nfrom credit_domain import footprint",
    "of others": "import torch._dynamo\nfrom os import path",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_reaches_behind_a_face_is_refused(what):
    assert list(check_layers.behind_faces(REFUSED[what], ROOT, LOWER))


@pytest.mark.parametrize("what", ALLOWED)
def test_faces_may_be_imported(what):
    assert not list(check_layers.behind_faces(ALLOWED[what], ROOT, LOWER))


def test_tests_may_reach_through_a_face_and_not_around_it():
    through = "from credit_halo.extend import ops\nops.start"
    assert list(check_layers.behind_faces(through, ROOT, LOWER))
    assert not list(check_layers.behind_faces(through, ROOT, LOWER, through=True))
    assert list(check_layers.behind_faces(REFUSED["a deep module"], ROOT, LOWER, through=True))


def test_the_line_and_the_reason_are_told():
    (found,) = check_layers.behind_faces("import os\n\nfrom credit_halo import agreement", ROOT, LOWER)
    assert found == (3, "agreement is not in __all__ of credit_halo")


def test_no_package_reaches_behind_a_face():
    assert check_layers.check_faces(ROOT, ["credit-mesh", "credit-halo", "credit-domain", "credit-parallel"]) == []


# Imported here: what torch makes at its first import is no leftover of a test.
MODULES = {face: importlib.import_module(face) for faces in check_layers.FACES.values() for face in faces}


@pytest.mark.parametrize("face", MODULES)
def test_a_face_has_what_it_lists(face):
    module = MODULES[face]
    assert module.__doc__
    assert len(set(module.__all__)) == len(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
