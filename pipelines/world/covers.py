"""How each kind of surface looks: what it is made of in each season, and its texture."""

from dataclasses import dataclass

SEASONS = ("spring", "summer", "late_summer")


@dataclass(frozen=True)
class Cover:
    """`variants`: weight and the mixture in each of `SEASONS` (one: the same in all).

    `texture` names the pattern within an object, `spread` the relative variation of brightness
    between objects, `patchy` within one at tens of metres; `trees` the chance of a tree of which
    OSM knows nothing per 81 m².
    """

    texture: str
    variants: tuple[tuple[float, tuple[str, ...]], ...]
    spread: float = 0.08
    patchy: float = 0.06
    trees: float = 0.0


def _same(*mixtures: str) -> tuple[tuple[float, tuple[str, ...]], ...]:
    return tuple((1.0, (m,)) for m in mixtures)


COVERS: dict[str, Cover] = {
    "base": Cover("grass", ((1, ("0.8 grass + 0.2 grass_dry", "0.55 grass + 0.45 grass_dry",
                                 "0.3 grass + 0.7 grass_dry")),), 0, 0.12, 0.03),
    "field": Cover("rows", (
        (3.0, ("0.9 crop_green + 0.1 soil", "0.75 crop_ripe + 0.25 crop_green", "stubble")),  # wheat
        (1.4, ("crop_blue_green", "0.9 crop_ripe + 0.1 soil", "0.7 stubble + 0.3 soil")),  # barley
        (2.2, ("soil", "0.55 crop_green + 0.45 soil", "crop_green")),  # maize
        (0.8, ("soil_light", "0.5 crop_green + 0.5 soil_light", "0.9 crop_green + 0.1 soil")),
        (1.2, ("0.8 rape_flower + 0.2 crop_green", "0.6 crop_ripe + 0.4 crop_blue_green",
               "0.5 stubble + 0.5 soil")),  # rape
        (0.9, ("soil_dark", "0.7 crop_blue_green + 0.3 soil_dark", "0.5 grass_dry + 0.5 soil_dark")),
        (0.7, ("0.6 grass + 0.4 soil", "grass_dry", "grass_dry")),  # fallow
        (0.9, ("grass_rich", "grass", "0.6 grass + 0.4 grass_dry")),  # ley
    ), 0.09, 0.11, 0.0012),
    "meadow": Cover("grass", ((2, ("grass_rich", "0.8 grass + 0.2 grass_dry", "0.5 grass + 0.5 grass_dry")),
                              (1, ("grass", "0.6 grass + 0.4 grass_dry", "grass_dry"))), 0.08, 0.1, 0.012),
    "lawn": Cover("grass", ((1, ("0.7 grass + 0.3 grass_rich", "grass", "0.7 grass + 0.3 grass_dry")),),
                  0.08, 0.08, 0.03),
    "park": Cover("grass", ((1, ("0.6 grass + 0.4 grass_rich", "0.9 grass + 0.1 gravel",
                                 "0.75 grass + 0.25 grass_dry")),), 0.08, 0.09, 0.1),
    "golf": Cover("grass", ((1, ("0.5 grass + 0.5 grass_dry",)),), 0.05, 0.12, 0.06),
    "fairway": Cover("mown", ((1, ("grass_rich",)),), 0.05, 0.04),
    "forest": Cover("canopy", (
        (1.6, ("0.55 broadleaf_young + 0.45 bare_branches", "broadleaf", "0.95 broadleaf + 0.05 grass_dry")),
        (1.0, ("conifer",)),
        (0.8, ("0.5 conifer + 0.3 broadleaf_young + 0.2 bare_branches", "0.5 conifer + 0.5 broadleaf",
               "0.5 conifer + 0.5 broadleaf")),
    ), 0.1, 0.12),
    "scrub": Cover("shrub", ((1, ("0.5 heather + 0.3 grass + 0.2 bare_branches",
                                  "0.4 heather + 0.3 broadleaf + 0.3 grass_dry",
                                  "0.5 heather + 0.2 broadleaf + 0.3 grass_dry")),), 0.1, 0.16, 0.16),
    "heath": Cover("shrub", ((1, ("0.6 heather + 0.4 grass_dry", "0.7 heather + 0.3 grass",
                                  "0.8 heather + 0.2 grass_dry")),), 0.1, 0.18, 0.03),
    "orchard": Cover("orchard", ((1, ("grass", "0.7 grass + 0.3 grass_dry", "0.4 grass + 0.6 grass_dry")),
                                 (0.5, ("0.6 soil + 0.4 grass",))), 0.08, 0.07),
    "vineyard": Cover("vineyard", ((1, ("0.8 soil_light + 0.2 grass", "0.8 soil_light + 0.2 grass_dry",
                                        "0.8 soil_light + 0.2 grass_dry")),
                                   (1, ("0.6 soil + 0.4 grass",))), 0.1, 0.07),
    "wetland": Cover("shrub", ((1, ("0.5 reeds + 0.3 lake + 0.2 grass_dry", "0.65 reeds + 0.25 lake + 0.1 grass",
                                    "0.75 reeds + 0.25 lake")),), 0.12, 0.3, 0.01),
    "garden": Cover("garden", ((1, ("0.75 grass + 0.25 paving", "0.7 grass + 0.3 paving",
                                    "0.45 grass + 0.25 grass_dry + 0.3 paving")),
                               (1, ("0.5 grass + 0.5 paving",))), 0.09, 0.14, 0.15),
    "yard": Cover("rough", _same("0.6 asphalt_old + 0.4 paving", "0.5 paving + 0.5 gravel",
                                 "0.7 asphalt + 0.3 gravel"), 0.12, 0.12, 0.008),
    "plaza": Cover("paved", _same("paving", "0.6 paving + 0.4 concrete"), 0.1, 0.06, 0.02),
    "campus": Cover("garden", ((1, ("0.55 grass + 0.45 paving", "0.5 grass + 0.5 paving",
                                    "0.3 grass + 0.2 grass_dry + 0.5 paving")),), 0.08, 0.12, 0.05),
    "cemetery": Cover("graves", ((1, ("0.45 grass + 0.55 gravel",)),), 0.06, 0.08, 0.04),
    "allotment": Cover("plots", ((1, ("0.6 grass + 0.4 soil", "0.7 crop_green + 0.3 soil",
                                      "0.5 crop_green + 0.5 soil")),), 0.07, 0.2, 0.08),
    "bare": Cover("rough", _same("0.7 soil + 0.3 gravel", "0.5 soil_light + 0.5 gravel",
                                 "0.6 soil + 0.4 grass_dry"), 0.12, 0.2, 0.006),
    "quarry": Cover("rough", _same("0.6 rock + 0.4 gravel"), 0.1, 0.22),
    "rock": Cover("rough", _same("0.7 rock + 0.3 grass_dry", "0.6 rock + 0.4 rock_dark"), 0.1, 0.24),
    "sand": Cover("sandy", _same("sand"), 0.06, 0.08),
    "asphalt": Cover("paved", _same("asphalt", "0.5 asphalt + 0.5 asphalt_old", "asphalt_old"), 0.09, 0.04),
    "runway": Cover("paved", _same("0.7 asphalt + 0.3 asphalt_old"), 0.04, 0.05),
    "concrete": Cover("paved", _same("concrete", "0.7 concrete + 0.3 asphalt_old"), 0.08, 0.05),
    "parking": Cover("parking", _same("asphalt", "0.5 asphalt + 0.5 asphalt_old", "0.8 asphalt_old + 0.2 gravel"),
                     0.1, 0.05, 0.01),
    "track": Cover("rough", _same("0.6 soil_light + 0.4 grass_dry", "0.6 gravel + 0.4 grass"), 0.12, 0.1),
    "path": Cover("rough", _same("0.6 gravel + 0.4 grass_dry", "0.7 soil_light + 0.3 grass"), 0.1, 0.08),
    "sidewalk": Cover("paved", _same("0.6 concrete + 0.4 asphalt_old", "paving"), 0.07, 0.04),
    "ballast": Cover("sleepers", _same("ballast", "0.8 ballast + 0.2 tile_brown"), 0.06, 0.04),
    "hedge": Cover("canopy", ((1, ("0.7 broadleaf_young + 0.3 bare_branches", "broadleaf", "broadleaf")),), 0.12),
    "wall": Cover("smooth", _same("rock")),
    "court": Cover("smooth", _same("clay_court", "turf_artificial", "0.6 metal_green + 0.4 asphalt"), 0.06, 0.02),
    "turf": Cover("mown", _same("grass_rich", "0.8 grass_rich + 0.2 soil"), 0.05, 0.05),
    "sea": Cover("sea", _same("sea"), 0, 0.05),
    "lake": Cover("lake", _same("lake", "0.7 lake + 0.3 river"), 0.1, 0.05),
    "river": Cover("lake", _same("river"), 0.02, 0.06),
    "pool": Cover("smooth", _same("pool"), 0.08),
    "solar": Cover("solar", _same("solar"), 0.05),
    "roof_pitched": Cover("tiles", ((4, ("tile_red",)), (3, ("tile_orange",)), (2.4, ("tile_brown",)),
                                    (3, ("slate",)), (0.5, ("metal_grey",)), (0.6, ("0.7 tile_red + 0.3 slate",))),
                          0.13, 0.02),
    "roof_flat": Cover("flat_roof", ((3, ("roof_gravel",)), (2, ("bitumen",)), (1.6, ("concrete",)),
                                     (0.8, ("0.5 bitumen + 0.5 grass",)), (1, ("0.6 metal_grey + 0.4 bitumen",))),
                       0.12, 0.03),
    "roof_hall": Cover("ribbed", ((3, ("metal_grey",)), (2.2, ("metal_white",)), (0.9, ("metal_blue",)),
                                  (1.6, ("roof_gravel",)), (0.5, ("tile_red",)), (0.6, ("metal_green",)),
                                  (1.4, ("bitumen",))), 0.12, 0.03),
    "roof_farm": Cover("ribbed", ((2, ("metal_grey",)), (2, ("tile_brown",)), (1, ("0.5 tile_brown + 0.5 rock",))),
                       0.12, 0.03),
    "greenhouse": Cover("ribbed", _same("glass"), 0.06, 0.02),
    "car": Cover("smooth", tuple((w, (m,)) for w, m in (
        (3, "paint_white"), (2.5, "metal_grey"), (3, "paint_dark"), (0.8, "paint_red"), (1, "paint_blue"))), 0.1),
    "marking": Cover("smooth", _same("0.8 paint_white + 0.2 asphalt")),
    "tree": Cover("crown", (
        (3, ("0.6 broadleaf_young + 0.4 bare_branches", "broadleaf", "0.9 broadleaf + 0.1 grass_dry")),
        (1.5, ("broadleaf_young", "0.6 broadleaf + 0.4 broadleaf_young", "broadleaf")),
        (1.2, ("conifer",)),
    ), 0.16),
}  # fmt: skip

COVER_NAMES = tuple(COVERS)
COVER_ID = {name: i for i, name in enumerate(COVER_NAMES)}
TEXTURES = tuple(sorted({c.texture for c in COVERS.values()}))
