"""HTTP: the application (`http`), one package a dialect (`ollama`, `openai`, `anthropic`), the cluster's own
routes (`cluster`), and what all dialects share (`engine`). A dialect imports no other dialect.
"""
