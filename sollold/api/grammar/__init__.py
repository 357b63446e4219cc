"""JSON schemas and patterns as llama.cpp's grammars can enforce them.

`schema` is the way in: it resolves references and hands on to `rewrite`, which joins what llama.cpp would
overlook beside a choice or a reference (`join`), and settles what is left by type (`settle`).
`unenforced` names what stays free. `grammar_width` and `schema_width` bound what a grammar may grow to.
"""
