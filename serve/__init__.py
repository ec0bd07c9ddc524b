# SPDX-License-Identifier: Apache-2.0
"""`pocketphi serve`: the library behind an HTTP interface that OpenAI's clients speak (pocketphi[serve])."""
