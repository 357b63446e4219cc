"""HTTP: the application (`http`), one package per dialect (`ollama`, `openai`, `anthropic`), the cluster's
own endpoints (`cluster`), code shared by all dialects (`engine`), and constrained output (`grammar`).

A dialect imports no other dialect.
"""
