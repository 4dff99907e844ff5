"use strict";
(() => {
  const root = document.documentElement;
  const themes = ["", "light", "dark"];
  const button = document.getElementById("theme");
  const show = (theme) => {
    if (theme) root.dataset.theme = theme; else delete root.dataset.theme;
    button.textContent = theme ? theme[0].toUpperCase() + theme.slice(1) : "Automatic";
    button.setAttribute("aria-label", "Colours: " + button.textContent.toLowerCase());
  };
  // Storage is refused for local files in some browsers; the choice then lasts until the page is closed.
  let theme = "";
  try { theme = localStorage.getItem("onnx-lowrank-theme") || ""; } catch { }
  show(theme);
  button.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    show(theme);
    try { localStorage.setItem("onnx-lowrank-theme", theme); } catch { }
  });

  document.getElementById("download").addEventListener("click", () => {
    const text = document.getElementById("report").textContent;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "report.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });

  const value = (row, index, numeric) => {
    const raw = row.cells[index].dataset.value;
    if (raw === undefined) return null;
    return numeric ? Number(raw) : raw;
  };
  // What was not measured stands last in both directions.
  const compare = (a, b, sign) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    table.querySelectorAll("th").forEach((head, index) => {
      head.querySelector("button")?.addEventListener("click", () => {
        const numeric = head.classList.contains("num");
        const before = head.getAttribute("aria-sort");
        const next = before ? (before === "descending" ? "ascending" : "descending") : (numeric ? "descending" : "ascending");
        table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", next);
        const sign = next === "ascending" ? 1 : -1;
        const rows = [...table.tBodies[0].rows];
        rows.sort((a, b) => compare(value(a, index, numeric), value(b, index, numeric), sign));
        table.tBodies[0].append(...rows);
      });
    });
  }

  const filter = document.getElementById("filter");
  filter?.addEventListener("input", () => {
    const wanted = filter.value.toLowerCase();
    for (const row of document.querySelectorAll("#table-sites tbody tr")) {
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
    }
  });
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
})();
