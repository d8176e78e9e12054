"""Scores, a cost and a solver exactly as papers and their codes have them, to compare with. Pass them as objects."""

from papers.csmpq import PublishedCSMPQ as PublishedCSMPQ
from papers.ompq import PublishedOMPQ as PublishedOMPQ
from papers.published_rounding import PublishedRounding as PublishedRounding
from papers.published_size import PublishedSize as PublishedSize
