"""What alembic runs: the revisions asked for, over the connection and in the transaction it is given."""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    # SQLite, too, takes back a CREATE TABLE; alembic assumes that the driver would not let it.
    transactional_ddl=True,
    version_table="egressd_version",  # a database of PostgreSQL may be shared with others who use alembic
)
context.run_migrations()
