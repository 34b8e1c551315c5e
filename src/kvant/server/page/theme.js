// Loaded before the first paint, so that a remembered theme does not flash.
(() => {
  const KEY = "kvant.theme";
  const system = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;

  function stored() {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null;
    }
  }

  function apply(theme) {
    if (theme === "light" || theme === "dark") root.dataset.theme = theme;
    else delete root.dataset.theme;
    document.dispatchEvent(new Event("themechange"));
  }

  window.kvantTheme = {
    isDark: () => (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark",
    toggle() {
      const theme = this.isDark() ? "light" : "dark";
      apply(theme);
      try {
        localStorage.setItem(KEY, theme);
      } catch {
        // Private windows may have no storage: the choice then lasts as long as the page.
      }
    },
  };
  system.addEventListener("change", () => document.dispatchEvent(new Event("themechange")));
  apply(stored());
})();
