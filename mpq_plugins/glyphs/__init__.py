"""Letters, digits and Greek rendered from the fonts of matplotlib: a harder task than the digits, with nothing to download."""

from mpq_plugins.glyphs._data import glyphs as glyphs
from mpq_plugins.glyphs._distortion import Distortion as Distortion
from mpq_plugins.glyphs._fonts import CLASSES as CLASSES
from mpq_plugins.glyphs._fonts import FONTS as FONTS
from mpq_plugins.glyphs._fonts import HELD_OUT_FONTS as HELD_OUT_FONTS
from mpq_plugins.glyphs._sheet import save_sheet as save_sheet
from mpq_plugins.glyphs._training import Recipe as Recipe
from mpq_plugins.glyphs._training import TrainedNet as TrainedNet
from mpq_plugins.glyphs._training import cached_path as cached_path
from mpq_plugins.glyphs._training import train_or_restore as train_or_restore
from mpq_plugins.glyphs._training import trained_glyph_net as trained_glyph_net
