"""Block-scaled FP8 on a GPU: dequantised there, with the bits of its bfloat16 twin."""

import pytest
import torch
from block_scaled import recover_both

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_the_bits_of_the_twin(make_config, tmp_path, family):
    recover_both(make_config, tmp_path, family, engine__device="cuda")
