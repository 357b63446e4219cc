"""HTTP: the application (`http`), one package a dialect (`ollama`, `openai`, `anthropic`), the cluster's own
routes (`cluster`), what all dialects share (`engine`), and what an engine can enforce (`grammar`).

A dialect imports no other dialect.
"""
