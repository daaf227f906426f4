"""What checks annotations in the tests: beartype, to which an int is a float as well (PEP 484)."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
