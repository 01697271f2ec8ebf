"""Names of operations: tuples as text, and back."""

from hypothesis import given
from hypothesis import strategies as st

from credit_domain.engine.text import as_text, from_text
from credit_halo.testing import run_threads

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
nested = st.recursive(plain, lambda inner: st.lists(inner, max_size=4).map(tuple))


@given(nested)
def test_what_was_given_comes_back(value):
    again = from_text(as_text(value))
    assert again == value
    assert repr(again) == repr(value)  # 1 is not 1.0, nor True


def test_many_threads_read_at_once():
    deep = (((((((((1, 2.5),),),),),),),),)
    values = [(deep,) * (i % 7 + 1) for i in range(200)]
    assert run_threads(lambda rank: [from_text(as_text(value)) for value in values], 8) == [values] * 8
