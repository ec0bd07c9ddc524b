# SPDX-License-Identifier: Apache-2.0
"""What a quantized model lost, by task metrics, perplexity and KL divergence; importances, to lose less."""
