"use strict";
(() => {
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const palettes = {
    light: ["#0072b2", "#d55e00", "#009e73", "#b0579a", "#c98a00", "#3a9bd1", "#767676", "#8c564b"],
    dark: ["#4fa8e8", "#ff8a3d", "#2fc69a", "#dc8fc6", "#f0b429", "#8fd0f5", "#b0b0b0", "#c99a8e"],
  };

  function config(isDark) {
    const style = getComputedStyle(document.documentElement);
    const [ink, quiet, line] = ["--ink", "--quiet", "--line"].map((name) => style.getPropertyValue(name).trim());
    const font = getComputedStyle(document.body).fontFamily;
    const narrow = document.body.clientWidth < 520;
    return {
      background: "transparent",
      font,
      view: { stroke: line },
      axis: { labelColor: quiet, titleColor: quiet, gridColor: line, domainColor: line, tickColor: line,
        titleFontWeight: 500, labelFontSize: 11, titleFontSize: 12, gridOpacity: 0.7, labelLimit: narrow ? 110 : 220 },
      legend: { labelColor: ink, titleColor: quiet, labelFontSize: 12, columns: narrow ? 2 : 4 },
      mark: { color: ink },
      line: { color: ink },
      point: { color: ink },
      rule: { color: ink },
      text: { color: ink, fontSize: 12 },
      bar: { color: quiet },
      range: { category: palettes[isDark ? "dark" : "light"] },
    };
  }

  function spread(value, narrow) {
    if (Array.isArray(value)) return value.map((one) => spread(one, narrow));
    if (value === null || typeof value !== "object") return value;
    const found = {};
    for (const [name, one] of Object.entries(value)) found[name] = spread(one, narrow);
    if (narrow && found.legend && found.legend.columns) found.legend.columns = 2;
    return found;
  }

  const drawn = new Map();
  async function draw(name, isDark) {
    const place = document.getElementById(name);
    const still = place.querySelector(".still");
    const narrow = document.body.clientWidth < 520;
    const result = await vegaEmbed(place, spread(specs[name], narrow), {
      renderer: "svg", ast: true, config: config(isDark), tooltip: { theme: "custom", disableDefaultStyle: false },
      actions: { export: true, source: false, compiled: false, editor: false },
    });
    if (drawn.has(name)) drawn.get(name).finalize();
    drawn.set(name, result);
    if (still) still.remove();
    place.removeAttribute("role");
    place.dataset.drawn = isDark ? "dark" : "light";
  }

  // One after the other, when they come into view: the page itself is there at once.
  let turn = Promise.resolve();
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((one) => one.isIntersecting)) {
      seen.unobserve(entry.target);
      turn = turn.then(() => draw(entry.target.id, dark.matches));
    }
  }, { rootMargin: "400px" });
  Object.keys(specs).forEach((name) => seen.observe(document.getElementById(name)));
  dark.addEventListener("change", () => {
    for (const name of drawn.keys()) turn = turn.then(() => draw(name, dark.matches));
  });
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
})();
