"""Letters, digits and Greek rendered from the fonts of matplotlib: a harder task than the digits, with nothing to download."""

from glyphs.data import glyphs as glyphs
from glyphs.distortion import Distortion as Distortion
from glyphs.fonts import CLASSES as CLASSES
from glyphs.fonts import FONTS as FONTS
from glyphs.fonts import HELD_OUT_FONTS as HELD_OUT_FONTS
from glyphs.sheet import save_sheet as save_sheet
from glyphs.training import Recipe as Recipe
from glyphs.training import TrainedNet as TrainedNet
from glyphs.training import cached_path as cached_path
from glyphs.training import train_or_restore as train_or_restore
from glyphs.training import trained_glyph_net as trained_glyph_net
