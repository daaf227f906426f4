"""The contract that every method keeps (docs/design.md, section 11), in a form that the tests and
`effivlm check` both run.
"""
