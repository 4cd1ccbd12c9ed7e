-- Catalog of a dataset (DuckDB). Written by the coordinating process of a build alone; open it
-- read-only and ask questions in SQL.
CREATE TABLE IF NOT EXISTS meta (key VARCHAR PRIMARY KEY, value VARCHAR NOT NULL);
CREATE TABLE IF NOT EXISTS builds (
  build INTEGER PRIMARY KEY, started TIMESTAMP NOT NULL, finished TIMESTAMP, config JSON NOT NULL,
  version VARCHAR NOT NULL, snapshot INTEGER, state VARCHAR NOT NULL
);
CREATE TABLE IF NOT EXISTS regions (build INTEGER NOT NULL, geojson JSON NOT NULL);
CREATE TABLE IF NOT EXISTS extracts (
  extract VARCHAR PRIMARY KEY, source VARCHAR NOT NULL, sha256 VARCHAR NOT NULL,
  bytes BIGINT NOT NULL, osm_timestamp VARCHAR, objects BIGINT NOT NULL, parquet VARCHAR NOT NULL
);
CREATE TABLE IF NOT EXISTS scenes (
  build INTEGER NOT NULL, shard VARCHAR NOT NULL, scene VARCHAR NOT NULL, acquired TIMESTAMP,
  cloud_cover DOUBLE, candidate BOOLEAN NOT NULL, block_cloud DOUBLE, coverage DOUBLE,
  chosen BOOLEAN NOT NULL, rank INTEGER, reason VARCHAR NOT NULL
);
CREATE TABLE IF NOT EXISTS tag_counts (
  extract VARCHAR NOT NULL, key VARCHAR NOT NULL, value VARCHAR NOT NULL, objects BIGINT NOT NULL
);
CREATE TABLE IF NOT EXISTS shards (
  build INTEGER NOT NULL, shard VARCHAR NOT NULL, content_key VARCHAR NOT NULL,
  state VARCHAR NOT NULL, path VARCHAR, checksum VARCHAR, split VARCHAR, chips INTEGER,
  objects BIGINT, edges BIGINT, bytes BIGINT, seconds DOUBLE, message VARCHAR
);
CREATE TABLE IF NOT EXISTS chips (
  shard VARCHAR NOT NULL, content_key VARCHAR NOT NULL, chip VARCHAR NOT NULL,
  lon DOUBLE NOT NULL, lat DOUBLE NOT NULL, valid REAL NOT NULL, objects INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS findings (
  build INTEGER NOT NULL, shard VARCHAR, code VARCHAR NOT NULL, severity VARCHAR NOT NULL,
  count BIGINT NOT NULL, message VARCHAR
);
-- Of shards built or adopted by a build; `chip` is the position in the shard.
CREATE TABLE IF NOT EXISTS chip_findings (
  build INTEGER NOT NULL, shard VARCHAR NOT NULL, content_key VARCHAR NOT NULL,
  chip INTEGER NOT NULL, code VARCHAR NOT NULL
);
