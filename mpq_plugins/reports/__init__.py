"""What people look at: tables and plots."""

from mpq_plugins.reports.certificate import certificate_lines as certificate_lines
from mpq_plugins.reports.comparison import CONTROLS as CONTROLS
from mpq_plugins.reports.comparison import Comparison as Comparison
from mpq_plugins.reports.comparison import compare as compare
from mpq_plugins.reports.plots import plot_allocation as plot_allocation
from mpq_plugins.reports.plots import plot_comparison as plot_comparison
from mpq_plugins.reports.tables import allocation_table as allocation_table
from mpq_plugins.reports.tables import comparison_table as comparison_table
from mpq_plugins.reports.tables import layer_table as layer_table
from mpq_plugins.reports.tables import skipped_table as skipped_table
from mpq_plugins.reports.training_plots import plot_training as plot_training
