"""OSM extracts converted once a test process: Monaco, and a hamlet of odd cases."""

from pathlib import Path

import osmium
import pytest
from osmium.osm import mutable

from pipelines.osm import Extract, convert_extracts
from schemas.sources import OsmSource


@pytest.fixture(scope="session")
def monaco_pbf(shared: Path) -> Path:
    return shared / "data" / "monaco.osm.pbf"


@pytest.fixture(scope="session")
def monaco_extract(monaco_pbf: Path, tmp_path_factory: pytest.TempPathFactory) -> Extract:
    """Monaco, with the tag filter of a config that says nothing of tags."""
    source = OsmSource(pbf=monaco_pbf)
    return convert_extracts([monaco_pbf], tmp_path_factory.mktemp("monaco"), source)


class Hamlet:
    """Writes a PBF of squares and lines by name, around 9 degrees east, 48 degrees north."""

    def __init__(self) -> None:
        self.nodes: dict[tuple[float, float], int] = {}
        self.ways: dict[str, mutable.Way] = {}
        self.relations: dict[str, mutable.Relation] = {}
        self.tagged: list[mutable.Node] = []

    def node(self, x: float, y: float) -> int:
        return self.nodes.setdefault((x, y), len(self.nodes) + 1)

    def point(self, x: float, y: float, **tags: str) -> None:
        at = (9 + x / 1e4, 48 + y / 1e4)
        self.tagged.append(mutable.Node(id=5000 + len(self.tagged), location=at, tags=tags))

    def way(
        self, called: str, /, *xy: tuple[float, float], extra: tuple[int, ...] = (), **tags: str
    ):
        refs = [self.node(x, y) for x, y in xy] + list(extra)
        self.ways[called] = mutable.Way(id=100 + len(self.ways), nodes=refs, tags=tags)

    def relation(self, called: str, /, *members: tuple[str, str], **tags: str) -> None:
        refs = [("w", self.ways[w].id if w in self.ways else 999, role) for w, role in members]
        self.relations[called] = mutable.Relation(
            id=200 + len(self.relations), members=refs, tags=tags
        )

    def osm(self, name: str) -> int:
        """Typed id of a way or relation."""
        if name in self.ways:
            return self.ways[name].id << 2 | 2
        return self.relations[name].id << 2 | 3

    def write(self, path: Path) -> Path:
        with osmium.SimpleWriter(str(path)) as writer:
            for (x, y), i in self.nodes.items():
                at = (x, y) if abs(x) > 90 else (9 + x / 1e4, 48 + y / 1e4)
                writer.add_node(mutable.Node(id=i, location=at))
            for node in self.tagged:
                writer.add_node(node)
            for way in self.ways.values():
                writer.add_way(way)
            for relation in self.relations.values():
                writer.add_relation(relation)
        return path


def square(x: float, y: float, side: float) -> list[tuple[float, float]]:
    """A closed ring."""
    return [(x, y), (x + side, y), (x + side, y + side), (x, y + side), (x, y)]


def make_hamlet(*, reverse: bool = False) -> Hamlet:
    """The odd cases; `reverse` lists the members of relations the other way round."""
    h = Hamlet()
    h.point(1, 1, natural="tree")
    h.point(2, 1, name="only a name")
    h.way("house", *square(10, 10, 2), building="yes", name="Home")
    h.way("square", *square(20, 10, 4), highway="pedestrian", area="yes")
    h.way("loop", *square(30, 10, 4), highway="pedestrian")
    h.way("roundabout", *square(40, 10, 4), highway="residential", junction="roundabout")
    h.way("bow tie", (50, 10), (54, 14), (54, 10), (50, 14), (50, 10), landuse="grass")
    h.way("spike", *square(60, 10, 4)[:-1], (60, 18), (60, 10), landuse="meadow")
    h.way("no length", (70, 10), (70, 10), highway="path")
    h.way("incomplete", (80, 10), (81, 10), extra=(998,), highway="path")
    h.way("untagged", (90, 10), (91, 10))
    h.way("across", (179.9, 0.1), (-179.9, 0.1), route="ferry")
    # A forest of 20 x 20 whose border is two ways, with a glade, and a second part.
    h.way("west", (0, 50), (0, 30), (10, 30))
    h.way("east", (10, 30), (20, 30), (20, 50), (0, 50))
    h.way("glade", *square(5, 35, 4), natural="grassland")
    h.way("wood", *square(30, 30, 5))
    members = [("west", "outer"), ("east", "outer"), ("glade", "inner"), ("wood", "outer")]
    h.relation("forest", *members[:: -1 if reverse else 1], type="multipolygon", landuse="forest")
    h.relation("broken", ("west", "outer"), ("gone", "outer"), type="boundary", boundary="x")
    h.relation("bus", ("loop", ""), type="route", route="bus")
    return h


@pytest.fixture(scope="session")
def hamlet() -> Hamlet:
    return make_hamlet()


@pytest.fixture(scope="session")
def reversed_hamlet() -> Hamlet:
    return make_hamlet(reverse=True)


@pytest.fixture(scope="session")
def hamlet_extract(hamlet: Hamlet, tmp_path_factory: pytest.TempPathFactory) -> Extract:
    folder = tmp_path_factory.mktemp("hamlet")
    pbf = hamlet.write(folder / "it's a hamlet.osm.pbf")
    return convert_extracts([pbf], folder / "cache", OsmSource(pbf=pbf))
