"""The report of a dataset: one self-contained HTML page.

`write_report` is all that others use. `facts` reads snapshot, history and vocabulary, `survey` the
shards, `records` the catalog where there is one; `layers`, `projection` and `map` draw the map,
`charts` the histograms, `pictures` the chips. The page's size is bounded whatever the dataset's:
shapes, shards read, scenes and pictures each have a most, and the page says what it left out.
"""

from flows.report.write import write_report

__all__ = ["write_report"]
