# SPDX-License-Identifier: Apache-2.0
"""Many items, one model: files of requests answered by several processes, or by machines that Ray has."""
