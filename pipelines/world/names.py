"""Names and words as mappers type them, in several languages."""

FIRST = ["des", "du", "de la", "de l'", "aux"]
STREET_KIND = [
    "Rue",
    "Avenue",
    "Place",
    "Chemin",
    "Boulevard",
    "Allée",
    "Impasse",
    "Kalea",
    "Calle",
    "Quai",
]
STREET_NAME = [
    "Moulins", "Pêcheurs", "Gare", "République", "Tilleuls", "Port", "Église", "Fontaine", "Marché",
    "Écoles", "Vignes", "Dunes", "Phare", "Jean Jaurès", "Victor Hugo", "Marie Curie", "Pasteur",
    "Lilas", "Acacias", "11 Novembre", "Liberté", "Cordeliers", "Remparts", "Saint-Martin", "Itsas",
    "Mendi", "Portua", "San Juan", "Olmos", "Lavoir", "Abbé Grégoire", "Corsaires", "Salines",
]  # fmt: skip
TOWN_NAMES = [
    "Port-Aven", "Kerlann", "Saint-Tugen", "Beaulieu", "Lannevez", "Les Salines", "Montfort",
    "Itsasondo",
    "Villanueva", "Plouzan", "Courtebois", "La Roche", "Hameau du Lac", "Trevarn", "Belle Croix",
    "Zubieta", "Le Moulin", "Kergoat", "Sainte-Anne", "Vieux Bourg",
]  # fmt: skip
SHOPS = [
    "bakery", "supermarket", "convenience", "clothes", "hairdresser", "butcher", "florist",
    "bakery;pastry",
    "car_repair", "bicycle", "books", "optician", "kiosk", "jewelry", "shoes", "mobile_phone",
    "yes",
    "hardware", "doityourself", "furniture", "beauty", "alcohol", "vacant",
]  # fmt: skip
AMENITIES = [
    "restaurant", "cafe", "bar", "pub", "fast_food", "pharmacy", "bank", "atm", "post_box", "bench",
    "waste_basket", "recycling", "bicycle_parking", "drinking_water", "dentist", "doctors", "fuel",
    "place_of_worship", "kindergarten", "library", "police", "townhall", "toilets", "parking_space",
    "charging_station", "vending_machine", "telephone",
]  # fmt: skip
PLACE_NAMES = [
    "Chez Marie", "Au Bon Pain", "Le Phare", "Café du Port", "Boulangerie Le Goff",
    "The Crown & Anchor",
    "Pizzeria Napoli", "Bar Txoko", "Ελληνική Ταβέρνα", "مطعم الشام", "פלאפל הזהב", "北京饭店",
    "Кафе Уют",
    "Dönerhaus", "L'Escale", "Crêperie Ti Koz", "Optique 20/20", "Coiff'Art", "Spar", "Marché U",
    "Garage Dupont & fils", "Fleurs d'Eau", "寿司 さくら", "Librairie \"Les Pages\"", "Bio=Bon",
]  # fmt: skip
NOTES = [
    "à vérifier sur le terrain", "approximate outline from imagery", "fixme: number?",
    "bâtiment démoli ?",
    "cadastre 2012; position décalée", "see changeset comment", "يرجى التحقق", "TODO survey   ",
]  # fmt: skip
SOURCES = [
    "Bing", "cadastre-dgi-fr source : Direction Générale des Impôts - Cadastre. Mise à jour : 2012",
    "survey", "local_knowledge", "Maxar", "survey;Bing", "Yahoo", "GPS", "extrapolation",
]  # fmt: skip
