"""Configure Sphinx: `sphinx-build -W -b html docs docs/_build/html` builds the site offline."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]
# The tutorials call `gpipe` and `nas` of this environment, also if it is not activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["TTY_COMPATIBLE"] = "0"  # Jupyter's kernels ask for colours; a page needs plain lines

import gpipe_jax  # noqa: E402

project = "gpipe-jax"
author = "The gpipe-jax authors"
copyright = author
version = release = gpipe_jax.__version__

extensions = [
    "generated_reference",  # in docs/_ext
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
# Links into the documentation of JAX and Flax need their inventories from the network. A build must
# work offline and with -W, so they are asked for: GPIPE_JAX_DOCS_INTERSPHINX=1 sphinx-build ...
if os.environ.get("GPIPE_JAX_DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "flax": ("https://flax.readthedocs.io/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
    }

exclude_patterns = ["_build", "_ext"]
default_role = "literal"  # docstrings write `name` for code
doctest_test_doctest_blocks = ""  # pytest runs the examples, with the names of their modules
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
smartquotes_action = "De"  # dashes and dots; quotes are code as often as not
add_module_names = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_in_temp = True  # runs are written into a folder that is deleted afterwards
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"  # errors end the build; what remains are warnings about threads

html_theme = "sphinx_book_theme"
html_title = f"gpipe-jax {release}"
html_theme_options = {
    "navbar_persistent": [],
    "show_navbar_depth": 1,
    "use_download_button": False,
}
html_static_path = ["_static"]
html_css_files = ["site.css"]
templates_path = []
