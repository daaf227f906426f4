"""The page that people open first: one file without network or server, or a folder for large
runs.
"""

from effivlm.report.page.write import page, write_page, write_view

__all__ = ["page", "write_page", "write_view"]
