"""`multiply_tile` for any number of panels, split into the tiles that there are.

Linear layers go through here, and both products of attention: the packed queries times keys, with
as many panels as a page has keys for, and rows of weights times values, with as many as the head
size takes.
"""

from __future__ import annotations

from typing import Any

import numba

from kernels.cpu_elements import COLUMNS
from kernels.cpu_tiles import multiply_tile, tile_panels

PANEL_BYTES = COLUMNS * 4
"""Of a panel of float32 results, and of one step of a panel that is multiplied."""


def panel_multiplier(row_bytes: int, adds: int) -> Any:
    """The function for rows that are `row_bytes` apart, or packed (0), which adds to what `out` is
    (1) or replaces it (0).

    It is inlined where it is called, because the compiler would translate its many tiles once more
    for each function on the way up.
    """

    def multiply(
        x_element: Any,
        w_element: Any,
        rows: int,
        panels: int,
        x: int,
        w: int,
        w_step: int,
        w_panel: int,
        steps: int,
        ahead: int,
        ahead_step: int,
        ahead_panel: int,
        out: int,
        out_row: int,
    ) -> None:
        """out = (or +=) x . w; see `kernels.cpu_tiles`. Results' panels lie side by side."""
        while panels > 0:
            done = tile_panels(rows, panels)
            multiply_tile(
                row_bytes,
                adds,
                x_element,
                w_element,
                rows,
                done,
                x,
                w,
                w_step,
                w_panel,
                steps,
                ahead,
                ahead_step,
                ahead_panel,
                out,
                out_row,
                PANEL_BYTES,
            )
            w += done * w_panel
            ahead += done * ahead_panel
            out += done * PANEL_BYTES
            panels -= done

    return numba.njit(inline="always")(multiply)
