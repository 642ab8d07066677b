"""Names of the shipped configs, as --config-file takes them.

sparse-detr configs
sparse-detr configs focus     # those with "focus" in their name
"""

from ..config import list_configs
from ..errors import UserError
from . import flags


def main() -> None:
    parser = flags.parser(__doc__)
    parser.add_argument("part", nargs="?", default="", help="of a name")
    part = parser.parse_args().part
    found = [name for name in list_configs() if part in name]
    if not found:
        raise UserError(f"no shipped config has {part!r} in its name: sparse-detr configs lists all")
    print(*found, sep="\n")
