"""What may be wrong about a frame's header."""

from hypothesis import strategies as st

U32 = st.integers(0, 4) | st.sampled_from([2**16, 2**31, 2**32 - 1])
SIZES = st.integers(0, 70) | st.sampled_from([4096, 8192, 1 << 20, (1 << 20) + 1, (1 << 30) + 1, 2**63, 2**64 - 1])
# What a test changes of a header that is signed afterwards.
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "kind": st.integers(0, 12) | st.just(255),
        "lease_id": st.integers(0, 3) | st.just(2**64 - 1),
        "epoch": U32,
        "layer_idx": U32,
        "first_slot": U32,
        "num_pages": U32,
        "payload_bytes": SIZES,
        "checksum": st.integers(0, 2**64 - 1),
    },
)
