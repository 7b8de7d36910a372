GRAPH_FLOAT32 = 1e-4
"""Graph against torch, both float32: logits and states of order 1 to 10 over 256 tokens."""
GRAPH_POSITIONS = 1e-4
"""Graph in float32 against torch in float64, at any position."""
GRAPH_FLOAT16 = 0.1
"""Graph with float16 weights and activations against torch in float32: logits of order 1 to 10."""
FLOAT16_KL = 1e-5
"""Mean KL of the trained fixture in float16 from float32, nats a token (measured 1.2e-6)."""
FLOAT64 = 1e-12
"""Sums of order 1 to 100 in float64, in another order."""
FLOAT32 = 1e-4
"""The same in float32."""
FLOAT32_PHASE = 1.2e-7
"""cos and sin rounded to float32."""
LOGITS_FLOAT64 = 1e-9
"""Logits of a whole model of order 1 to 10 in float64, head-norm epsilon 0 (measured 2e-14)."""
LOGITS_FLOAT32 = 1e-4
"""The same in float32, beyond what the epsilons explain (measured 4e-6)."""
BFLOAT16_STATE = 3e-2
"""A state of long memory in bfloat16 against float32 on the same weights, relative (gamma rounded to 1: above 0.3)."""

# Against the golden outputs of other implementations: largest absolute difference of logits of order 10.
GOLDEN_FLOAT64 = 1e-9
GOLDEN_FLOAT32 = 1e-4
# Of states, relative to the largest element.
GOLDEN_STATES = 1e-5
# What case.json states of an implementation's disagreement with itself, found again.
STATED_DISAGREEMENT = 1e-10
FLOAT32_PRODUCT = 2e-6
"""A matrix product in float32 over 256 columns or fewer, relative to the largest element."""
FLOAT16_PRODUCT = 2e-3
"""The same with activations and results in float16."""
FLOAT16_STATES = {"paper": 0.005, "slow": 0.15}
"""Scaled float16 states after 4096 random tokens against float32, relative, for gamma up to 1 - 2^-8 and up to
1 - 2^-20 (measured 0.0026 and 0.081)."""
FLOAT16_STATE_KL = 2e-6
"""Mean KL of the trained fixture with float16 states from float32 ones, nats a token (measured 3.8e-7)."""

# On a GPU: largest absolute difference of logits of order 1 to 10 from torch in float32 on the CPU. Set before any GPU
# ran them: float32 as on the CPU, float16 likewise, bfloat16 with eight times its rounding.
CUDA_LOGITS = {"float32": GRAPH_FLOAT32, "float16": GRAPH_FLOAT16, "bfloat16": 8 * GRAPH_FLOAT16}
CUDA_STATES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 0.15}
"""The same of states, relative to the largest element."""
CUDA_QUANTIZED = 2e-3
"""Logits of quantized weights in float32 on a GPU against float64 on the weights that they decode to."""
