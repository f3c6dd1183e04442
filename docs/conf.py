"""The documentation site: Markdown pages, the public API, and notebooks executed while building."""

project = "dynkit"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "dynkit"
html_static_path: list[str] = []
nb_execution_mode = "cache"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_cache_path = "../build/docs-cache"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature is in the docstring's words
napoleon_google_docstring = False
exclude_patterns = ["_build"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]
