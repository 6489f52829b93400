// Tables sort by the title pressed; without this script they stay as they are.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const titles = [...table.tHead.rows[0].cells];
  titles.forEach((title, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...title.childNodes);
    title.append(button);
    const name = button.firstChild.textContent.trim();
    button.addEventListener("click", () => {
      const before = title.getAttribute("aria-sort");
      const first = title.dataset.first || "ascending";
      const order = before === null ? first : before === "ascending" ? "descending" : "ascending";
      const sign = order === "ascending" ? 1 : -1;
      const value = (row) => row.cells[column].dataset.value;
      const text = column === 0 || title.dataset.kind === "text";
      const rows = [...body.rows].sort((a, b) =>
        sign * (text ? value(a).localeCompare(value(b), "en", { numeric: true }) : value(a) - value(b)));
      body.append(...rows);
      rows.forEach((row) => row.classList.remove("opens"));
      titles.forEach((other) => other.removeAttribute("aria-sort"));
      title.setAttribute("aria-sort", order);
      document.getElementById("sorted").textContent = `Sorted by ${name}, ${order}.`;
    });
  });
}
