"""How the heavy operations run: one function an operation, a plain reference beside each fast path.

``attention`` softmax attention with unequal widths · ``experts`` the routed experts ·
``cross_entropy`` the head's loss by chunks · ``norm`` RMSNorm · ``residual`` sum and norm in one
"""
