# SPDX-License-Identifier: Apache-2.0
"""What a quantized model lost: task metrics, perplexity, KL divergence, and the importances that make it lose less."""
