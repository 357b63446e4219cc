"""Converts JSON schemas and patterns to forms that llama.cpp's grammars can enforce.

`schema` is the entry point: it resolves references and calls `rewrite`, which joins what llama.cpp would
ignore beside a choice or a reference (`join`), and converts the rest by type (`settle`).
`unenforced` lists what is not enforced. `grammar_width` and `schema_width` limit the size of grammars.
"""
