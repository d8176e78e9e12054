"""What people look at: tables and plots."""

from mpq_plugins.reports._certificate import certificate_lines as certificate_lines
from mpq_plugins.reports._compare import CONTROLS as CONTROLS
from mpq_plugins.reports._compare import Comparison as Comparison
from mpq_plugins.reports._compare import compare as compare
from mpq_plugins.reports._plots import plot_allocation as plot_allocation
from mpq_plugins.reports._plots import plot_comparison as plot_comparison
from mpq_plugins.reports._tables import allocation_table as allocation_table
from mpq_plugins.reports._tables import comparison_table as comparison_table
from mpq_plugins.reports._tables import layer_table as layer_table
from mpq_plugins.reports._tables import skipped_table as skipped_table
from mpq_plugins.reports._training import plot_training as plot_training
